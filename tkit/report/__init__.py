"""Compares what sweeps left on disk. Reads files that another machine wrote last year; knows no server and no engine."""
