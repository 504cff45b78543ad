"""Training of judges on preference rows."""
