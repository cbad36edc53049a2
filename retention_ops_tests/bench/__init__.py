"""What the rules cost, side by side with the least anybody could do and with the usual tools: `make bench`.

Every task runs in a process of its own, in rounds that take each task once, so that a busy minute hits all alike. A figure
is the median of its rounds; a ratio divides two medians of the same run. Nothing here is a test: no figure fails anything.
"""
