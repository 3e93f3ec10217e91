"""The story: data, training, reports and the scripts. May import `models` and `serving`."""
