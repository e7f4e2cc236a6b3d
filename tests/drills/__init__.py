"""Drills: processes that are killed, stopped and signalled, disks that are not shared, launchers that start again."""
