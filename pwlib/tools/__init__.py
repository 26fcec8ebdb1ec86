"""What the command line does with a user's own images: draw and label them. Nothing else in the library imports it."""
