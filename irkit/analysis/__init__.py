"""Analysis: functions over sessions and traces, each with the source of its formula."""
