"""A grammar of vision encoders, and the properties that every one of them must keep."""
