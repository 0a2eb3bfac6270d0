"""How fast the fast paths are, as ratios to the straightforward way in the same run: `python -m bench --help`."""
