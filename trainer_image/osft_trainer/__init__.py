"""OSFT training: contract, parameter splitting, training loop, Python API (loaded lazily)."""
