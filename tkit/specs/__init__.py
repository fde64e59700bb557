"""What crosses a boundary between packages: frozen dataclasses and the tables of names they may hold."""
