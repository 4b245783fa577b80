"""Finding wrong results: random models run eager and fused against float64, `python -m fuse_pass.testing.fuzz`."""
