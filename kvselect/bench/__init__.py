"""Measuring kvselect against peers: what `kvselect bench` and the scripts in bench/ are made of."""
