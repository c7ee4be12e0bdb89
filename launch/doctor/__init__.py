"""`onecurve doctor`: what this machine or allocation can do, and what is wrong with it."""
