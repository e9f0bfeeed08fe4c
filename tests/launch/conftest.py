"""Fixtures of the tests that launch real trainings."""

from tests.launch.runs import references

__all__ = ["references"]
