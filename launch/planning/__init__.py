"""What `onecurve plan` works out before a run: memory, traffic, arithmetic, and which strategy fits."""
