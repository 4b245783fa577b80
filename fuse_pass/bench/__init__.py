"""Measurements: our ops and models against what people would use instead, alternately in one process."""
