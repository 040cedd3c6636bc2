// Package client is a client of the key-value service of examples/kv. Each of
// its writes takes effect once, although it sends a request again, to another
// node, until it knows the answer.
//
// Writes go through a session of the cluster: each has a number, Seq, by which
// the cluster recognises it when it comes again and answers as it did the first
// time. The client also says up to which number it needs no answers any more.
package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Errors that methods return match one of these, or are a *StatusError.
var (
	// ErrNotFound: there is no such key.
	ErrNotFound = errors.New("kv: there is no such key")
	// ErrConflict: the condition does not hold; nothing was changed.
	ErrConflict = errors.New("kv: the condition does not hold, nothing was changed")
	// ErrUnavailable: no node could answer before the context ended; nothing was
	// changed. It matches the context's error too.
	ErrUnavailable = errors.New("kv: no node could answer in time, nothing was changed")
	// ErrOutcomeUnknown: the write may have taken effect, or may later, once. Read
	// before you decide what to do.
	ErrOutcomeUnknown = errors.New("kv: the outcome is unknown: the write may have taken effect, or may later; read before deciding")
	// ErrSessionExpired: the session ended while a write was on its way, so that it
	// can't be sent again. It comes together with ErrOutcomeUnknown. The next
	// write opens another session.
	ErrSessionExpired = errors.New("kv: the session has ended")
	// ErrHistoryGone: no node that answers has the changes from there on any more.
	// List the keys, and watch on from the index that List returns.
	ErrHistoryGone = errors.New("kv: the changes asked for are in no node's history any more: list the keys and watch on from the index of the list")
	// ErrClosed: Close was called before.
	ErrClosed = errors.New("kv: the client is closed")
)

// StatusError is an answer that sending the request again would not change.
type StatusError struct {
	Code int    // of HTTP
	Text string // what the node says about it
}

func (e *StatusError) Error() string { return fmt.Sprintf("kv: status %d: %s", e.Code, e.Text) }

// Consistency says how new what is read must be.
type Consistency string

// The consistencies of Get and List.
const (
	Linearizable Consistency = "linearizable" // includes every write acknowledged before the call
	Lease        Consistency = "lease"        // the same, as long as the nodes' clocks run at about the same rate
	Stale        Consistency = "stale"        // what some node has
)

const (
	firstPause = 20 * time.Millisecond // between two attempts; it doubles
	maxPause   = time.Second
	maxWindow  = 256      // writes between the first without an answer and the newest; the service allows 1024
	maxAnswer  = 64 << 20 // bytes
)

// Client speaks to the nodes of a cluster. Its methods may be called at the same
// time, and send requests again until the context ends: give them one that does.
type Client struct {
	// AttemptTimeout is for how long one node may think about a request before
	// another one is asked; default 6s, which is longer than a node waits for a
	// leader. Set it before the first call.
	AttemptTimeout time.Duration

	addrs []string // http://host:port
	http  *http.Client
	node  atomic.Uint32 // which of addrs is asked first: the one that answered last
	w     writer
}

// New returns a client of the nodes at these addresses, each HOST:PORT. A nil
// transport is http.DefaultTransport.
func New(addrs []string, transport http.RoundTripper) (*Client, error) {
	c := &Client{AttemptTimeout: 6 * time.Second, http: &http.Client{Transport: transport}}
	c.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse } // no node sends any
	for _, addr := range addrs {
		u, err := url.Parse("http://" + addr)
		if err != nil || u.Host != addr || u.Port() == "" {
			return nil, fmt.Errorf("kv: %q is not HOST:PORT, such as 127.0.0.1:8701", addr)
		}
		c.addrs = append(c.addrs, u.String())
	}
	if len(c.addrs) == 0 {
		return nil, errors.New("kv: no address: name the nodes, each as HOST:PORT")
	}
	c.node.Store(rand.Uint32()) // not all clients on one node
	c.w.init()
	return c, nil
}

// call is one request, which may be sent several times.
type call struct {
	method, path string // path with the query
	header       http.Header
	body         string
}

// answer is what a node said, or that it said nothing.
type answer struct {
	code    int // 0: none came
	header  http.Header
	body    []byte
	err     error
	reached bool // the request may have reached the node
}

// final tells whether another attempt can't be answered otherwise.
func (a *answer) final() bool {
	return a.code != 0 && a.code < 500 && a.code != http.StatusTooManyRequests
}

// unknown tells whether the request may have been executed although the answer
// does not say so. Only a node that says "not done" is believed.
func (a *answer) unknown() bool {
	return a.reached && a.code == 0 || a.header.Get("Outcome") == "unknown" ||
		a.code >= 500 && a.code != http.StatusServiceUnavailable
}

func (a *answer) String() string {
	if a.code == 0 {
		return a.err.Error()
	}
	return fmt.Sprintf("status %d: %s", a.code, strings.TrimSpace(string(a.body)))
}

// retry sends a request to one node after another until one answers it for good,
// or ctx ends. unknown says that an attempt which was not answered for good may
// have been executed.
func (c *Client) retry(ctx context.Context, r call) (a answer, unknown bool, err error) {
	for pause := firstPause; ; pause = min(2*pause, maxPause) {
		n := c.node.Load()
		a = c.attempt(ctx, c.addrs[n%uint32(len(c.addrs))], r)
		if a.final() {
			return a, unknown || a.unknown(), nil
		}
		unknown = unknown || a.unknown()
		if a.code != http.StatusTooManyRequests {
			c.node.CompareAndSwap(n, n+1) // unless somebody else has moved on already
		}
		// A pause of random length keeps clients that failed together from
		// coming back together.
		timer := time.NewTimer(pause/2 + rand.N(pause/2))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return a, unknown, fmt.Errorf("%w (last attempt: %v)", ctx.Err(), &a)
		}
	}
}

// attempt sends a request once.
func (c *Client) attempt(ctx context.Context, addr string, r call) (a answer) {
	ctx, cancel := context.WithTimeout(ctx, c.AttemptTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, r.method, addr+r.path, strings.NewReader(r.body))
	if err != nil {
		return answer{err: err}
	}
	for name, values := range r.header {
		req.Header[name] = values
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var op *net.OpError
		return answer{err: err, reached: !errors.As(err, &op) || op.Op != "dial"}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return answer{err: err, reached: true}
	}
	return answer{code: resp.StatusCode, header: resp.Header, body: body, reached: true}
}

// outcome turns a final answer into an error, nil if it is a success.
func (a *answer) outcome() error {
	text := strings.TrimSpace(string(a.body))
	switch {
	case a.code < 300:
		return nil
	case a.code == http.StatusNotFound && strings.HasPrefix(text, "there is no key"):
		return ErrNotFound
	case a.code == http.StatusPreconditionFailed:
		return fmt.Errorf("%w: %s", ErrConflict, text)
	}
	return &StatusError{a.code, text}
}

// version is that of the key, from the ETag.
func (a *answer) version() uint64 {
	v, err := strconv.ParseUint(strings.Trim(a.header.Get("ETag"), `"`), 10, 64)
	if err != nil {
		return 0
	}
	return v
}

// keyPath escapes also what would be taken for a directory.
func keyPath(key string) string {
	if key == "." || key == ".." {
		return "/kv/" + strings.ReplaceAll(key, ".", "%2E")
	}
	return "/kv/" + url.PathEscape(key)
}

// read is retry for what changes nothing.
func (c *Client) read(ctx context.Context, path string) (answer, error) {
	a, _, err := c.retry(ctx, call{method: http.MethodGet, path: path})
	if err != nil {
		return a, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return a, a.outcome()
}

// Get returns the value of a key and its version, or ErrNotFound.
func (c *Client) Get(ctx context.Context, key string, level Consistency) (value []byte, version uint64, err error) {
	if key == "" {
		return nil, 0, errors.New("kv: the key is empty")
	}
	a, err := c.read(ctx, keyPath(key)+"?consistency="+url.QueryEscape(string(level)))
	if err != nil {
		return nil, 0, err
	}
	return a.body, a.version(), nil
}
