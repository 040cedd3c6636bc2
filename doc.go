/*
Package raft keeps a state machine identical on several machines: the Raft
consensus algorithm of Ongaro and Ousterhout with leader election, log
replication, durable storage, snapshots and membership changes. A service
imports it, gives it a state machine, and gets a cluster that goes on while a
majority of its nodes lives.

	type counter struct{ n int64 }

	// Every node applies the same commands in the same order.
	func (c *counter) Apply(raft.Entry) []byte { c.n++; return fmt.Append(nil, c.n) }
	func (c *counter) Snapshot() (raft.Capture, error) {
		return raft.CaptureBytes(fmt.Append(nil, c.n)), nil
	}
	func (c *counter) Restore(r io.Reader) error { _, err := fmt.Fscan(r, &c.n); return err }

	func main() {
		ctx := context.Background()
		node, err := raft.Start(ctx, raft.Config{
			ID:           "a",
			ClusterID:    "counters",
			StateMachine: &counter{},
			Storage:      raft.NewMemoryStorage(),                       // or, to survive a crash, Dir: "/var/lib/counter"
			Bootstrap:    []raft.Member{{ID: "a", Addr: "127.0.0.1:0"}}, // or three members on three machines
		})
		if err != nil {
			log.Fatal(err)
		}
		defer node.Close()
		for range 3 {
			result, err := node.Propose(ctx, []byte("+1")) // on any node; returns once it is committed and applied
			if err != nil {
				log.Print(err)
				return
			}
			fmt.Printf("the counter is %s\n", result.Data)
		}
	}

# Guarantees

  - A proposal that returned without an error is committed: it is synced to the
    disks of a majority and applied on the node that returned it. It stays
    committed while a majority of the disks survives.
  - Every node applies the same commands in the same order, each at the index
    and term that [Result] and [Entry] say.
  - An error of a proposal is a rejection, after which the command never
    commits, or matches [ErrOutcomeUnknown]. Where nobody can tell, it is
    unknown.
  - A command proposed by [Server.ProposeOnce] takes effect once, however often
    and on whichever node it is sent, and always gets its original result, while
    its session lasts.
  - Reading the state machine after [Server.ReadIndex] is linearizable. After
    [Server.ReadLease] it is while clocks keep to [Config.MaxClockDriftPercent].
  - At most one node leads a term. Terms are fencing tokens.
  - A data directory that is damaged, of another node, or of a newer format is
    refused with a [CorruptError] or [IdentityError]; nothing in it is changed.
    What cannot be told from a crash is listed in docs/FORMAT.md.
  - After [Server.Close] has returned nil the node has no goroutine, no open
    file and no port, and calls neither the state machine nor the storage.

# What is not guaranteed

  - A command proposed again after an unknown outcome may be applied twice,
    except by [Server.ProposeOnce].
  - Reading the state machine directly may return old data, on the leader too.
    Call [Server.ReadIndex] first.
  - Reads by [Server.ReadLease] are wrong where the rates of clocks differ by
    more than the configuration says. Leases are off by default.
  - Nodes are trusted: a node that lies, or a disk that says it has synced what
    it has not, breaks every promise.
  - A data directory that was set back to an older state is found out only by a
    peer that runs and remembers a later start of it; a copy of one, only where
    its identity file has another inode number, or by a peer that has heard from
    both.
  - Nothing is encrypted or authenticated unless [Config.TLS] is set.
  - [MemoryStorage] promises nothing once its process has ended.

# Concurrency

All methods of [Server] and [Proposal] may be called from any goroutine. A
context governs how long a call waits, never whether a command commits. The
state machine is called by one goroutine at a time.

# Reading the source

In this order: core.go (the state of Figure 2 and what one transition leaves to
do), election.go, replication.go, quorum.go, log.go, progress.go, change.go,
transfer.go, snapshot.go, readindex.go, lease.go, session.go, health.go, then
outbox.go and pending.go (what may leave when, and who is told what). raft.go
and apply.go drive them with goroutines, server.go is the user's handle, link.go
and serve.go the two ends of a connection, disk.go the storage. docs/DESIGN.md
explains how they fit together, docs/DIVERGENCE.md where they differ from the
paper.
*/
package raft
