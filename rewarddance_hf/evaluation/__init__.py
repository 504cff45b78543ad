"""Measuring reward models: accuracy, consistency and calibration on preference rows."""
