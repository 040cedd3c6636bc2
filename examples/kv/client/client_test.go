package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fortytw2/leaktest"
)

// node answers as the test wants, and notes what it was asked. Its sessions are
// called 1, 2, ...; everything else is answered by handle.
type node struct {
	handle   http.HandlerFunc
	mu       sync.Mutex
	sessions int
	asked    []string // "METHOD PATH Session/Seq/Done-Below"
}

func (n *node) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := r.Header
	n.mu.Lock()
	n.asked = append(n.asked, fmt.Sprintf("%s %s %s/%s/%s", r.Method, r.URL.Path, h.Get("Session"), h.Get("Seq"), h.Get("Done-Below")))
	if r.URL.Path == "/sessions" {
		n.sessions++
		w.Header().Set("Session", fmt.Sprint(n.sessions))
	}
	n.mu.Unlock()
	if r.URL.Path == "/sessions" {
		w.WriteHeader(http.StatusCreated)
		return
	}
	n.handle(w, r)
}

func (n *node) log() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Join(n.asked, "\n")
}

// RoundTrip is a network without connections: every port but 1 is closed. A
// handler that answers hangUp breaks the connection.
func (n *node) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Port() != "1" {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("refused")}
	}
	w := httptest.NewRecorder()
	w.Code = 200
	n.ServeHTTP(w, r)
	if w.Code == hangUp {
		return nil, errors.New("connection reset")
	}
	return w.Result(), nil
}

const hangUp = 999

func newTestClient(t *testing.T, transport http.RoundTripper, addrs ...string) *Client {
	t.Helper()
	c, err := New(addrs, transport)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.http.CloseIdleConnections)
	return c
}

// startServer serves handle on a real port.
func startServer(t *testing.T, handle http.HandlerFunc) (addr string) {
	s := httptest.NewServer(handle)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func TestNew(t *testing.T) {
	for _, addrs := range [][]string{nil, {""}, {"localhost"}, {"http://localhost:1"}, {"localhost:1/kv"}, {"localhost:1", "a b:2"}, {"localhost:x"}} {
		if _, err := New(addrs, nil); err == nil || !strings.Contains(err.Error(), "HOST:PORT") {
			t.Errorf("New(%q): %v", addrs, err)
		}
	}
}

// says is one answer of a node.
type says struct {
	code    int
	unknown bool
	text    string
	giveUp  bool // the caller's context ends when it has this answer
}

// bodyThen calls then when the client has read the answer.
type bodyThen struct {
	io.ReadCloser
	then func()
}

func (b bodyThen) Close() error { b.then(); return b.ReadCloser.Close() }

// script answers writes with one says after the other.
type script struct {
	node
	says   []says
	giveUp func()
}

func (s *script) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Path == "/sessions" {
		return s.node.RoundTrip(r)
	}
	now := s.says[0]
	s.says = s.says[1:]
	s.handle = func(w http.ResponseWriter, r *http.Request) {
		if now.unknown {
			w.Header().Set("Outcome", "unknown")
		}
		w.WriteHeader(now.code)
		fmt.Fprint(w, now.text)
	}
	if now.code == 0 {
		r.URL.Host = "dead:2"
	}
	resp, err := s.node.RoundTrip(r)
	if now.giveUp && err == nil {
		resp.Body = bodyThen{resp.Body, s.giveUp}
	} else if now.giveUp {
		s.giveUp()
	}
	return resp, err
}

// What a node answers decides what the caller is told, and whether the request
// is sent again first.
func TestWriteErrors(t *testing.T) {
	done := says{code: 200, text: "5"}
	for _, c := range []struct {
		name   string
		says   []says // all are needed
		want   []error
		not    error
		status int
	}{
		{"done", []says{done}, nil, nil, 0},
		{"not done, then done", []says{{code: 503}, {code: 201, text: "5"}}, nil, nil, 0},
		{"unknown, then done", []says{{code: 504, unknown: true}, {code: hangUp}, {code: 500}, {}, done}, nil, nil, 0},
		{"window, then done", []says{{code: 429}, done}, nil, nil, 0},
		{"not done", []says{{code: 503, giveUp: true}}, []error{ErrUnavailable, context.Canceled}, ErrOutcomeUnknown, 0},
		{"no node", []says{{}, {giveUp: true}}, []error{ErrUnavailable, context.Canceled}, ErrOutcomeUnknown, 0},
		{"hung up, then not done", []says{{code: hangUp}, {code: 503, giveUp: true}}, []error{ErrOutcomeUnknown, context.Canceled}, ErrUnavailable, 0},
		{"hung up", []says{{code: hangUp, giveUp: true}}, []error{ErrOutcomeUnknown, context.Canceled}, ErrUnavailable, 0},
		{"failed", []says{{code: 500, giveUp: true}}, []error{ErrOutcomeUnknown, context.Canceled}, ErrUnavailable, 0},
		{"unknown", []says{{code: 504, unknown: true, giveUp: true}}, []error{ErrOutcomeUnknown, context.Canceled}, ErrUnavailable, 0},
		{"expired, then done in another session", []says{{code: 410}, done}, nil, nil, 0},
		{"dead node, then expired, then done", []says{{}, {code: 410}, done}, nil, nil, 0},
		{"unknown, then expired", []says{{code: 504, unknown: true}, {code: 410, text: "why"}}, []error{ErrOutcomeUnknown, ErrSessionExpired}, nil, 0},
		{"expired after an attempt of the node's", []says{{code: 410, unknown: true, text: "why"}}, []error{ErrOutcomeUnknown, ErrSessionExpired}, nil, 0},
		{"conflict", []says{{code: 412}}, []error{ErrConflict}, nil, 0},
		{"no key", []says{{code: 404, text: "there is no key \"k\""}}, []error{ErrNotFound}, nil, 0},
		{"another service", []says{{code: 404, text: "page not found"}}, nil, nil, 404},
		{"no number", []says{{code: 409, text: "no number"}}, nil, nil, 409},
		{"redirect", []says{{code: 307}}, nil, nil, 307},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, giveUp := context.WithCancel(t.Context())
				defer giveUp()
				n := &script{says: c.says, giveUp: giveUp}
				sum, err := newTestClient(t, n, "node:1").Add(ctx, "k", 1)
				for _, want := range c.want {
					if !errors.Is(err, want) {
						t.Errorf("%v is not: %v", err, want)
					}
				}
				var status *StatusError
				if errors.As(err, &status) != (c.status != 0) || c.status != 0 && status.Code != c.status {
					t.Errorf("%v, want status %d", err, c.status)
				}
				if c.want == nil && c.status == 0 && (err != nil || sum != 5) || c.not != nil && errors.Is(err, c.not) {
					t.Errorf("%d, %v", sum, err)
				}
				if len(n.says) > 0 {
					t.Errorf("it was not asked %d more times:\n%s", len(n.says), n.log())
				}
			})
		})
	}
}

// Nobody waits for a node that does not answer longer than AttemptTimeout, nor
// sends requests as fast as it can.
func TestPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &node{handle: func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			w.WriteHeader(hangUp)
		}}
		c := newTestClient(t, n, "node:1", "dead:2")
		c.AttemptTimeout = 2 * time.Second
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		if _, _, err := c.Get(ctx, "k", Stale); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if took := time.Since(began); took != time.Minute {
			t.Errorf("it gave up after %v", took)
		}
		if n := len(n.asked); n < 15 || n > 25 {
			t.Errorf("the node was asked %d times in a minute", n)
		}
	})
}

// A request that is sent again, here to another node, is the same request; later
// ones say that its answer is there. A dead node is not asked for ever.
func TestSequenceNumbers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := 0
		n := &node{handle: func(w http.ResponseWriter, r *http.Request) {
			if i++; i == 2 {
				w.Header().Set("Outcome", "unknown")
				w.WriteHeader(504)
			} else if i == 4 {
				w.WriteHeader(410)
			}
		}}
		c := newTestClient(t, n, "node:1", "dead:2")
		c.node.Store(1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for i := range 3 {
			if _, err := c.Put(ctx, "k", []byte("v"), Condition{}); err != nil {
				t.Fatalf("write %d: %v", i, err)
			}
		}
		if err := c.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		want := strings.Join([]string{"POST /sessions //",
			"PUT /kv/k 1/1/1", "PUT /kv/k 1/2/2", "PUT /kv/k 1/2/2", "PUT /kv/k 1/3/3",
			"POST /sessions //", "PUT /kv/k 2/1/1", "DELETE /sessions/2 //"}, "\n")
		if got := n.log(); got != want {
			t.Errorf("the node was asked\n%s\nwant\n%s", got, want)
		}
	})
}

// While the oldest write has no answer, only so many newer ones are sent: the
// cluster keeps results from it on, and would end the session.
func TestWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held := make(chan struct{})
		n := &node{handle: func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Seq") == "1" {
				<-held
			}
		}}
		c := newTestClient(t, n, "node:1")
		put := func(ctx context.Context) error {
			_, err := c.Put(ctx, "k", nil, Condition{})
			return err
		}
		first := make(chan error, 1)
		go func() { first <- put(t.Context()) }()
		synctest.Wait()
		for range maxWindow - 1 {
			if err := put(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := put(ctx); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a write beyond the window: %v", err)
		}
		close(held)
		if err := <-first; err != nil {
			t.Error(err)
		}
		if err := put(t.Context()); err != nil {
			t.Errorf("after the first one was answered: %v", err)
		}
		want := fmt.Sprintf("PUT /kv/k 1/%d/%d", maxWindow+1, maxWindow+1)
		if got := n.log(); !strings.HasSuffix(got, want) {
			t.Errorf("the last request was %s, want %s", got[strings.LastIndex(got, "\n")+1:], want)
		}
	})
}

// The first writes of a client, all at once, share one session.
func TestOneSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &node{handle: func(http.ResponseWriter, *http.Request) {}}
		c := newTestClient(t, roundTrip(func(r *http.Request) (*http.Response, error) {
			time.Sleep(time.Second)
			return n.RoundTrip(r)
		}), "node:1")
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				if _, err := c.Put(t.Context(), "k", nil, Condition{}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if n.sessions != 1 {
			t.Errorf("%d sessions were opened", n.sessions)
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A watch goes on where it was, and ends with an error that says what to do.
func TestWatchResumes(t *testing.T) {
	t.Cleanup(leaktest.Check(t))
	stream := func(events string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, events) }
	}
	change := func(index int) string {
		return fmt.Sprintf("id: %d\ndata: {\"index\":%d,\"key\":\"k\",\"value\":\"v\"}\n\n", index, index)
	}
	gone := func(w http.ResponseWriter, r *http.Request) { http.Error(w, "too old", http.StatusGone) }
	bad := func(w http.ResponseWriter, r *http.Request) { http.Error(w, "not of this cluster", 400) }
	for _, c := range []struct {
		name   string
		serves []http.HandlerFunc
		after  uint64
		seen   string
		from   string // the "after" of each request
		want   error
		status int
	}{
		{"broken, stopped and cut streams", []http.HandlerFunc{
			stream(change(3) + "id: 7\n\n"), stream(change(8) + "event: stopped\ndata: bye\n\n"),
			stream(change(9) + "id: 12\ndata: {\"index\":12"), gone},
			0, "3 8 9", "0 7 8 9", ErrHistoryGone, 0},
		{"from now on", []http.HandlerFunc{stream(""), stream("id: 5\n\n"), stream(change(6)), bad}, Now, "6", "  5 6", nil, 400},
		{"too slow", []http.HandlerFunc{stream(change(3) + "event: gone\ndata: too slow\n\n")}, 2, "3", "2", ErrHistoryGone, 0},
		{"no node", []http.HandlerFunc{func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503) }, bad}, 2, "", "2 2", nil, 400},
		{"nonsense", []http.HandlerFunc{stream("id: x\n\n"), stream("data: {\n\n"), bad}, 2, "", "2 2 2", nil, 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			var from []string
			addr := startServer(t, func(w http.ResponseWriter, r *http.Request) {
				from = append(from, r.URL.Query().Get("after"))
				c.serves[min(len(from), len(c.serves))-1](w, r)
			})
			var seen []string
			var last error
			for change, err := range newTestClient(t, &http.Transport{}, addr).Watch(t.Context(), "k", c.after) {
				if last = err; err == nil {
					seen = append(seen, fmt.Sprint(change.Index))
				}
			}
			var status *StatusError
			if c.want != nil && !errors.Is(last, c.want) || c.status != 0 && (!errors.As(last, &status) || status.Code != c.status) {
				t.Errorf("it ended with %v", last)
			}
			if strings.Join(seen, " ") != c.seen || strings.Join(from, " ") != c.from {
				t.Errorf("saw %q from %q, want %q from %q", seen, from, c.seen, c.from)
			}
		})
	}
}

// Another node may have what one has no more, and a watch ends with its context.
func TestWatchTriesOthers(t *testing.T) {
	t.Cleanup(leaktest.Check(t))
	short := startServer(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusGone) })
	long := startServer(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "id: 4\ndata: {\"index\":4,\"key\":\"/w==\",\"value\":\"\",\"deleted\":true,\"base64\":true}\n\n")
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	c := newTestClient(t, &http.Transport{}, short, long)
	for range 2 { // whichever it begins with
		c.node.Add(1)
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		for change, err := range c.Watch(ctx, "", 3) {
			if n++; n == 1 && (err != nil || change.Key != "\xff" || !change.Deleted || change.Value != nil || change.Index != 4) {
				t.Errorf("%+v, %v", change, err)
			} else if n == 2 && !errors.Is(err, context.Canceled) {
				t.Errorf("after the context ended: %+v, %v", change, err)
			}
			cancel()
		}
		cancel()
		if n != 2 {
			t.Errorf("%d steps", n)
		}
	}
}

// A node that has had its say about one place of the log has said nothing about
// a later one: a watch that goes on ends only when no node has what comes next.
func TestWatchAsksAllAgain(t *testing.T) {
	t.Cleanup(leaktest.Check(t))
	requests := 0
	restarted := startServer(t, func(w http.ResponseWriter, r *http.Request) {
		if requests++; requests == 1 {
			w.WriteHeader(http.StatusGone)
			return
		}
		fmt.Fprint(w, "id: 5\ndata: {\"index\":5,\"key\":\"k\",\"value\":\"v\"}\n\n")
	})
	slow := startServer(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "id: 4\ndata: {\"index\":4,\"key\":\"k\",\"value\":\"v\"}\n\nevent: gone\ndata: too slow\n\n")
	})
	c := newTestClient(t, &http.Transport{}, restarted, slow)
	c.node.Store(0)
	var seen []uint64
	for change, err := range c.Watch(t.Context(), "", 3) {
		if err != nil {
			t.Fatal(err)
		}
		if seen = append(seen, change.Index); len(seen) == 2 {
			break
		}
	}
	if len(seen) != 2 || seen[0] != 4 || seen[1] != 5 {
		t.Errorf("saw %d, want 4 and 5", seen)
	}
}

// One node has what the others have no more, and can't be reached for a while. How
// often the others are asked meanwhile does not matter, and they are asked once.
// Only a node that stays away is waited for no longer.
func TestWatchWaitsForTheLastNode(t *testing.T) {
	for _, v := range []struct {
		name  string
		fails int // attempts at the node that has the history
		want  error
	}{{"it comes back", 4, nil}, {"it stays away", 1000, ErrHistoryGone}} {
		synctest.Test(t, func(t *testing.T) {
			asked := map[string]int{}
			n := &node{}
			c := newTestClient(t, roundTrip(func(r *http.Request) (*http.Response, error) {
				asked[r.URL.Host]++
				n.handle = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusGone) }
				if r.URL.Host == "full:1" {
					n.handle = func(w http.ResponseWriter, _ *http.Request) {
						if w.WriteHeader(hangUp); asked["full:1"] > v.fails {
							w.(*httptest.ResponseRecorder).Code = http.StatusOK
							fmt.Fprint(w, "id: 4\ndata: {\"index\":4,\"key\":\"k\",\"value\":\"v\"}\n\n")
						}
					}
				}
				return n.RoundTrip(r)
			}), "short:1", "shorter:1", "full:1")
			began := time.Now()
			for change, err := range c.Watch(t.Context(), "", 3) {
				if !errors.Is(err, v.want) || err == nil && change.Index != 4 {
					t.Errorf("%s: %+v, %v", v.name, change, err)
				}
				if err == nil {
					break
				}
			}
			if asked["short:1"] != 1 || asked["shorter:1"] != 1 || time.Since(began) > 5*time.Second {
				t.Errorf("%s: after %v these were asked: %v", v.name, time.Since(began), asked)
			}
		})
	}
}
