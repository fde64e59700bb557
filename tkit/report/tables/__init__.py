"""A comparison -> tables of text. Every rendering draws these, so that none can show another number."""
