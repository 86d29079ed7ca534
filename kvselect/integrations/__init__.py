"""Bridges from other frameworks to kvselect; each is imported only when it is asked for."""
