"""What is promised and who keeps it: contracts, operands, judge, report. Importing this package imports nothing heavy."""
