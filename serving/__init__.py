"""Where people meet the model: a server for many at once."""
