"""A deterministic simulation of one partition's protocol, and of the workers that hand partitions to each other.

The protocol (`pipeline.partition`: offer, snapshot, committed, sink_rows, sunk, restore) has no I/O and no clock. Here a seeded scheduler drives it
over doubles of Kafka and ClickHouse, in the order in which `pipeline.streaming` does, and stops it between any two steps. In the end everything
recovers, and the warehouse must say what an uninterrupted run would have said.

    python -m tests.simulation --schedules 1000000 --processes 2 --seed 1     many, with a progress bar
    python -m tests.simulation --seed 4711 --replay                           one, step by step; a failing one is made small first
    python -m tests.simulation --seed 4711 --replay --broken "not fenced"     the same with the protocol broken on purpose

Files, from the bottom: `log` and `warehouse` (the doubles, held against the real parts by tests/contract/test_simulation_doubles.py), `case` (records
and settings), `worker` (what a worker process does, cut into steps), `world` (all of it under one scheduler), `check` (what must be true in the end),
`schedule` (drawing, running and shrinking), `mutations` (the protocol broken in one way each).

What is modelled
- Kafka: offsets shared by records and transaction markers; transactions with begin, sends, commit and abort; a decided transaction whose markers come
  later, a partition at a time; fencing by a producer of the same id, which settles the former one's transaction; the coordinator's own time-out; read_committed up
  to the last stable offset; the head of the changelog deleted before a committed snapshot, also late, also while another worker reads it.
- ClickHouse: ReplacingMergeTree, so the newest version of a key counts, whatever order rows come in. Two values of one version are an error at once.
- Every request (start of a producer, sends, commit, deletion, insert) can succeed, succeed without a reply, fail, stay on its way and be carried out
  much later, long after its sender died; an insert can stop after some of the tables.
- Workers: one to three over one or two partitions. They crash between any two steps, sleep and wake as zombies, hold while the group rebalances, flush what they
  hold, get partitions assigned that another one still believes to own, lose a transaction and take over again. Assignments are arbitrary, which is more than a
  consumer group would ever do. Runs that were fetched before a seek still arrive after it.
- Standbys: a worker follows the changelog of partitions that are not its own, a few records at a time, and may be given them at any moment.
- Topics are read in any order and in runs of any length. Records out of order, too late, duplicated, in the wrong partition (sent on through the
  re-keyed topic) and malformed. Snapshots and deltas, of one or of many changelog records; cells evicted; topics idle.

What must be true in the end
- The dead letters hold each bad and each too-late record exactly once, and so does the warehouse's `rejects`.
- Each record of each topic is accounted for once: applied, duplicate, rejected, too late or re-keyed; the warehouse's `progress` says the same.
- Counts and a funnel equal a plain recomputation from the records (tests/oracle). Event times are drawn so that the verdicts on lateness do not
  depend on the order of reading; in the schedules where they do, the dead letters say which events were too late.
- In a part of the schedules every row of every table equals that of one partition that was never interrupted.
- On the way: no ContinuityError, and no ChangelogError in a worker that was not fenced.

What is not modelled
- Kafka losing acknowledged records, a changelog that someone else deletes or writes, brokers and leaders: the faults tier has those on real parts.
- Time: the back-pressure of a slow warehouse, brakes, time-outs as durations. A time-out here is an event like any other.
- Definitions that change at a restart (generations), and a change of the number of partitions.
- The rows' way through ClickHouse's types and views (contract and integration suites), and what a table computes (property suites).
"""
