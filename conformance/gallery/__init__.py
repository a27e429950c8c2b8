"""Faulty backends that the suite must catch, legitimate ones that it must not accuse, and rules of others to compare with.

Decides: nothing by itself; `lowbit.conformance.mutants` judges what lies here. Refuses: faults without a defect report, or a
class of defects, behind them.
"""
