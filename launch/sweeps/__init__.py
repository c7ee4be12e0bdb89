"""`onecurve sweep`: many runs of one command line, and what came of them."""
