"""The whole road in ten minutes, on generated phantoms or on a few of your own scans, with a report at its end."""
