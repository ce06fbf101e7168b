"""Interfaces of other libraries on top of raynixl: code written for them runs with one import changed."""
