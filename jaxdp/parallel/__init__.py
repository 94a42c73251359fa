"""Devices and processes: where arrays lie, and how processes hear of each other."""
