"""A user's own annotations: class lists, label files, the data set "folder", its checks, and conversions into it."""
