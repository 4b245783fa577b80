"""Fake quantisation of values and layers: functions, observers, calibration, conversion, Quantized* layers."""
