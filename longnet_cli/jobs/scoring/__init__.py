"""The job `score`: scoring.py makes a row of each document, measures.py holds what is measured."""
