"""People's judgements: blind sheets for them, and what they filled in.

May import runs and what lies below it; neither champions nor report.
"""
