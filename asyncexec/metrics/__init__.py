"""Exporters of an executor's metrics: one file for each system, see docs/metrics.md.

Each imports a package that asyncexec does not need otherwise, and says how to install it.
"""
