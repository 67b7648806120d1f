"""The command line: a file for each command, named as it is; `cli` puts them together, `options` has what they share.

May import all that there is, heavy things when they are needed; nothing imports a command but other commands.
"""
