"""Benchmarks: programs, not tests."""
