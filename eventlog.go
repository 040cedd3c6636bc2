package raft

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"sync"
)

const recentEvents = 1024

// eventLog keeps a node's recent events. Readers that are slow miss some and
// are told how many; Raft never waits for them.
type eventLog struct {
	node   NodeID
	logger *slog.Logger

	mu      sync.Mutex
	ring    []Event
	next    uint64        // number of the next event; event n is at n % recentEvents
	arrived chan struct{} // closed at the next event; nil while nobody waits
	ended   bool

	logMu  sync.Mutex // held by whoever writes to logger
	logged uint64
}

func (l *eventLog) add(events []Event) {
	if len(events) == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range events {
		e.Node = l.node
		if len(l.ring) < recentEvents {
			l.ring = append(l.ring, e)
		} else {
			l.ring[l.next%recentEvents] = e
		}
		l.next++
		if e.Kind == EventDead {
			l.ended = true
		}
	}
	if l.arrived != nil {
		close(l.arrived)
		l.arrived = nil
	}
}

// get returns event n or the oldest later one that is left.
func (l *eventLog) get(n uint64) (e Event, at uint64, arrived <-chan struct{}, ended bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n == l.next {
		if l.arrived == nil {
			l.arrived = make(chan struct{})
		}
		return Event{}, n, l.arrived, l.ended
	}
	if l.next-n > recentEvents {
		n = l.next - recentEvents
	}
	return l.ring[n%recentEvents], n, nil, false
}

// log writes new events to the logger, outside every lock but its own. If
// somebody is at it already, that one writes ours too.
func (l *eventLog) log() {
	for {
		l.mu.Lock()
		behind := l.logged < l.next
		l.mu.Unlock()
		if !behind || !l.logMu.TryLock() {
			return
		}
		for {
			l.mu.Lock()
			n, next := l.logged, l.next
			var e Event
			if n < next {
				if next-n > recentEvents {
					n = next - recentEvents
				}
				e = l.ring[n%recentEvents]
				l.logged = n + 1
			}
			l.mu.Unlock()
			if n >= next {
				break
			}
			l.write(e)
		}
		l.logMu.Unlock()
	}
}

func (l *eventLog) write(e Event) {
	level := slog.LevelInfo
	switch e.Kind {
	case EventElectionTimer, EventVoted, EventPreVote:
		level = slog.LevelDebug
	case EventConnection, EventFollowerStarved, EventQuorumLost, EventSnapshotKept:
		level = slog.LevelWarn
	case EventApplyFailed, EventFollowerLostData:
		level = slog.LevelError
	case EventDead:
		if e.Err != nil {
			level = slog.LevelError
		}
	}
	attrs := []slog.Attr{slog.String("node", string(l.node))}
	var panicked *ApplyError
	if errors.As(e.Err, &panicked) {
		attrs = append(attrs, slog.String("stack", panicked.Stack))
	}
	l.logger.LogAttrs(context.Background(), level, e.String(), attrs...)
}

// all yields recent events, then live ones, until ctx ends or the node is dead.
// Once ctx has ended no event is yielded that came after the call, or a node on
// which events come all the time would never let its reader go.
func (l *eventLog) all(ctx context.Context) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		var n uint64
		l.mu.Lock()
		recent := l.next
		l.mu.Unlock()
		for {
			e, at, arrived, ended := l.get(n)
			if arrived != nil {
				if ended {
					return
				}
				select {
				case <-arrived:
					continue
				case <-ctx.Done():
					return
				}
			}
			if n > 0 {
				e.Dropped = at - n
			}
			n = at + 1
			if at >= recent && ctx.Err() != nil || !yield(e) {
				return
			}
		}
	}
}
