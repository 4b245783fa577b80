"""Reading and writing Dynamo graphs; knows no pattern."""
