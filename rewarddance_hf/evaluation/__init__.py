"""Reward models measured: accuracy, consistency and calibration on preference rows."""
