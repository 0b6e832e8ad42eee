"""What every test may ask for: the cluster's fixtures."""

pytest_plugins = ["cluster.fixtures", "end_to_end_fixtures"]
