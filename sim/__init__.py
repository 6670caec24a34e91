"""The simulator: the production routing core over a trace, in virtual time."""
