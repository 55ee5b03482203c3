"""For whoever writes an environment: a package to begin with, and a check of the contract."""
