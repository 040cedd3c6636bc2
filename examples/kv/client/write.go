package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
)

// writer numbers the writes of a client in a session, which it opens when the
// first write needs one.
type writer struct {
	opening chan struct{} // holds a token: whoever has it may open the session

	mu      sync.Mutex
	session *session // nil: none is open
	closed  bool
}

func (w *writer) init() {
	w.opening = make(chan struct{}, 1)
	w.opening <- struct{}{}
}

// session is one of the cluster's. writer.mu guards what is in it.
type session struct {
	id      string
	next    uint64 // the Seq of the next write
	floor   uint64 // the lowest Seq without an answer; next if there is none
	waiting map[uint64]bool
	moved   chan struct{} // closed when floor rises; nil if nobody waits for that
}

// begin takes a number for a write. It waits while the oldest write without an
// answer is too far behind: the cluster keeps the answers from that one on.
func (c *Client) begin(ctx context.Context) (s *session, seq uint64, err error) {
	w := &c.w
	for {
		w.mu.Lock()
		s = w.session
		var wait <-chan struct{}
		switch {
		case w.closed:
			err = ErrClosed
		case s == nil:
			wait = w.opening
		case s.next-s.floor >= maxWindow:
			if s.moved == nil {
				s.moved = make(chan struct{})
			}
			wait = s.moved
		default:
			seq = s.next
			s.next++
			s.waiting[seq] = true
		}
		w.mu.Unlock()
		if wait == nil {
			return s, seq, err
		}
		select {
		case <-wait:
			if s == nil {
				err = c.openSession(ctx)
				w.opening <- struct{}{}
			}
		case <-ctx.Done():
			err = fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
		if err != nil {
			return nil, 0, err
		}
	}
}

// openSession makes sure that there is a session. It may be sent again without
// care: a session that nobody uses ends by itself.
func (c *Client) openSession(ctx context.Context) error {
	w := &c.w
	w.mu.Lock()
	there := w.session != nil || w.closed
	w.mu.Unlock()
	if there {
		return nil // somebody else was quicker
	}
	a, _, err := c.retry(ctx, call{method: http.MethodPost, path: "/sessions"})
	if err != nil {
		return fmt.Errorf("%w: opening a session: %w", ErrUnavailable, err)
	}
	if err := a.outcome(); err != nil {
		return err
	}
	id := a.header.Get("Session")
	if id == "" {
		return &StatusError{a.code, "the answer names no session: is this a node of examples/kv?"}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return ErrClosed
	}
	w.session = &session{id: id, next: 1, floor: 1, waiting: map[uint64]bool{}}
	return nil
}

// end gives a number back: the write has its answer, or is given up.
func (w *writer) end(s *session, seq uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(s.waiting, seq)
	old := s.floor
	for s.floor < s.next && !s.waiting[s.floor] {
		s.floor++
	}
	if s.floor > old && s.moved != nil {
		close(s.moved)
		s.moved = nil
	}
}

// drop forgets a session that has ended.
func (w *writer) drop(s *session) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.session == s {
		w.session = nil
	}
}

func (w *writer) doneBelow(s *session) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return s.floor
}

// write sends a write until it is answered. Without an answer the error says
// whether it may have taken effect.
func (c *Client) write(ctx context.Context, key string, r call) (answer, error) {
	if key == "" {
		return answer{}, errors.New("kv: the key is empty")
	}
	for {
		s, seq, err := c.begin(ctx)
		if err != nil {
			return answer{}, err
		}
		if r.header == nil {
			r.header = http.Header{}
		}
		r.header.Set("Session", s.id)
		r.header.Set("Seq", strconv.FormatUint(seq, 10))
		// The floor may rise while the request is sent again. It is said by
		// the next one.
		r.header.Set("Done-Below", strconv.FormatUint(c.w.doneBelow(s), 10))
		a, unknown, err := c.retry(ctx, r)
		c.w.end(s, seq)
		expired := err == nil && a.code == http.StatusGone
		if expired {
			c.w.drop(s)
		}
		switch {
		case expired && !unknown:
			continue // it was not executed, and may be in another session
		case expired:
			return a, fmt.Errorf("%w: %w: %s", ErrOutcomeUnknown, ErrSessionExpired, strings.TrimSpace(string(a.body)))
		case err != nil && unknown:
			return a, fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
		case err != nil:
			return a, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return a, a.outcome()
	}
}

// Condition is when a write is executed. The zero value is always.
type Condition struct{ name, value string }

// IfMissing is the condition that the key does not exist.
func IfMissing() Condition { return Condition{"If-None-Match", "*"} }

// IfPresent is the condition that the key exists.
func IfPresent() Condition { return Condition{"If-Match", "*"} }

// IfVersion is the condition of compare-and-set: the key is at this version.
func IfVersion(version uint64) Condition {
	return Condition{"If-Match", strconv.FormatUint(version, 10)}
}

func (c Condition) header() http.Header {
	h := http.Header{}
	if c.name != "" {
		h.Set(c.name, c.value)
	}
	return h
}

// Put writes a key and returns its new version.
func (c *Client) Put(ctx context.Context, key string, value []byte, when Condition) (version uint64, err error) {
	a, err := c.write(ctx, key, call{http.MethodPut, keyPath(key), when.header(), string(value)})
	if err != nil {
		return 0, err
	}
	return a.version(), nil
}

// Delete removes a key. If there is none, the error is ErrNotFound.
func (c *Client) Delete(ctx context.Context, key string, when Condition) error {
	_, err := c.write(ctx, key, call{http.MethodDelete, keyPath(key), when.header(), ""})
	return err
}

// Add adds n to a key that holds a decimal number, or nothing, which counts as 0,
// and returns the sum.
func (c *Client) Add(ctx context.Context, key string, n int64) (sum int64, err error) {
	a, err := c.write(ctx, key, call{http.MethodPost, keyPath(key) + "?add=" + strconv.FormatInt(n, 10), nil, ""})
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(a.body)), 10, 64)
}

// Close closes the session, so that the cluster keeps nothing for this client
// any more. Writes that are on their way may fail. A session that is not closed,
// because no node answers, ends by itself. Watches end with their contexts.
func (c *Client) Close(ctx context.Context) error {
	c.w.mu.Lock()
	s := c.w.session
	c.w.session, c.w.closed = nil, true
	c.w.mu.Unlock()
	defer c.http.CloseIdleConnections()
	if s == nil {
		return nil
	}
	a, _, err := c.retry(ctx, call{method: http.MethodDelete, path: "/sessions/" + s.id})
	if err != nil {
		return fmt.Errorf("%w: closing the session: %w", ErrUnavailable, err)
	}
	if a.code == http.StatusGone {
		return nil // it had ended
	}
	return a.outcome()
}
