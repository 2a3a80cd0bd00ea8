"""The job `score`: scoring.py reads documents, measures.py holds the results, score_rows.py writes them as rows."""
