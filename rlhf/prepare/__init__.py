"""The user's data: read in parts from files, rows of the configuration or the hub, checked, and put in order on disk.

Whatever the size of the data, memory holds a part of it and a few numbers for each row.
"""
