"""Bodies of the scripts that train judges and tune generators, told by flags or a YAML file (extra `scripts`)."""
