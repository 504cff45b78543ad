"""Preference rows and their way into batches."""
