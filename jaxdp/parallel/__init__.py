"""Devices and processes: where arrays are placed, and how processes communicate."""
