"""Pipelines on paper: where a row of blocks is cut, which rank computes what and when, how long that takes.

Pure, without torch, links or processes. ``partition`` cuts; ``schedules`` writes each rank's list; ``channels`` proves that lists run
and tells what travels; ``simulate`` gives seconds and memory; ``choose`` ranks what is possible. A runtime carries the lists out.
"""
