"""A small world of colored shapes whose truth is known: scenes, an exact oracle, preference rows."""
