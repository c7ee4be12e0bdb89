"""onecurve: kill it anywhere, resume it anywhere, the same curve."""

__version__ = "0.1.0"
