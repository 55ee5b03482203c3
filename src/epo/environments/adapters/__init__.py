"""Suites that play other libraries' environments. Each imports its library only when an environment is made."""
