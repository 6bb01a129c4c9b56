"""The training methods on real data: `python -m bench.methods NAME`, one file of this folder a NAME."""
